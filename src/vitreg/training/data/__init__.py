"""What is trained on: samples in an order that a seed decides, and what is made of them."""
