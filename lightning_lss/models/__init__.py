"""The LSS Transformer and its LightningModule."""
