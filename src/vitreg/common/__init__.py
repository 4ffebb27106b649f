"""What everything may use: files that a kill leaves whole, resampling, devices, numbers in words."""
