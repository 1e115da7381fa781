"""A recipe is a task: prompts and a reward, and for the ones that download nothing, a model made on the spot."""
