"""The main job, end to end on real data: distil, prune, factorise, quantise, compile, save, load, report."""
