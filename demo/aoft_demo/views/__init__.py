"""The page: layout of the tabs, cards, charts and notices."""
