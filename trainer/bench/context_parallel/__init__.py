"""`longspan bench context-parallel`: what it costs to hold one sequence together on several ranks."""
