"""Training: the `Trainer` subclass, recipes, and what belongs to them."""
