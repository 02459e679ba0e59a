"""What operators and clients ask besides answers: models, health, figures, control."""
