"""What is trained: a page each, with its loss, its augmentation, its settings and what to expect."""
