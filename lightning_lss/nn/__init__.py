"""What a model is made of beside attention: positions, dropout, loss, metrics, recomputation."""
