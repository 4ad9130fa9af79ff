"""Training on `transformers.Trainer`: of the selected weights (SET), or of all others (SPA)."""
