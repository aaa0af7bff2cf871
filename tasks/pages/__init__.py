"""Text for people: the report page, the theory page and the model card, with their templates."""
