"""What a feature pass keeps, and reading it back."""
