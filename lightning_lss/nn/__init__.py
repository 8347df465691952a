"""The parts of a model beside attention: positions, dropout, loss, metrics, recomputation."""
