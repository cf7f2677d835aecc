"""Result records shown: as tables on the terminal, as a page with plots, in Markdown, and in brief."""
