"""What training does before it trains: recipes that fit base and rows, plans of memory, advice. Above the loop."""
