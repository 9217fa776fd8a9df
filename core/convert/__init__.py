"""Conversion of a film: faces of its frames decoded as the other side, and blended back."""
