"""The truth: every operator in plain torch, exact in the integers, and a selectable backend."""
