"""Who holds what of a sequence, and how it is sent."""
