"""What a model has gone through: its logs read again, plots of them, and going back."""
