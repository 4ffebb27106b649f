"""The trainings of the paper (section 3.1), a page each: recipe, augmentation, loss and what to expect.

A recipe is a function that returns a config, with any number of registers. `smoke=True` gives a form that finishes in
two minutes on two CPU cores: to see that everything works, not to get a good model.
"""
