"""``python -m rollout_engine.bench``: generation throughput, beside transformers and the machine's own limit."""
