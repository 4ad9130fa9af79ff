"""Training on `transformers.Trainer`.

Safety Enhancement Tuning (SET) trains the selected entries, and Safety Preserving Adaptation (SPA)
keeps them as they are while the others train.
"""
