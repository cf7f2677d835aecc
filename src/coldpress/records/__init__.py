"""Result records: what stands in one, how they lie on disk, what their numbers are worth, and how they are said."""
