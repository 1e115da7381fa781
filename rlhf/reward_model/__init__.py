"""Training a reward model on preference pairs: ``rlhf reward-model CONFIG``."""
