"""What the page's tabs do, without a page."""
