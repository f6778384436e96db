"""How the page looks: tabs, cards, charts and notices."""
