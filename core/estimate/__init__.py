"""What a model costs, without running it: layers, products and bytes."""
