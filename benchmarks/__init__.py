"""What the published figures are reproduced with."""
