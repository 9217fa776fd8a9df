"""Training: from the settings to the loop, and what watches over it."""
