"""Report pages and model cards: data, tables, templates."""
