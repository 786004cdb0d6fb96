"""Language models as judges: asked both ways, counted on, and measured before they are trusted (docs/judges.md)."""
