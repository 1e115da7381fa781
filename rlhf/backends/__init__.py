"""How a model is wrapped, stepped and its gradients reduced. DeepSpeed is imported in ``deepspeed.py`` alone."""
