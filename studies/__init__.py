"""What is learnt: one module or folder per question, its data first and then its plot."""
