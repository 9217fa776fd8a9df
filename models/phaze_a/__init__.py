"""The model that its user builds of parts."""
