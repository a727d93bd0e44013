"""A live model: loading it, finding its sites, running interventions in it, baking edits into it."""
