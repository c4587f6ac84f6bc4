"""How well a model sees: tasks, a probe of whether it looks, text ability, and a page of what it sees."""
