"""The only folder that imports Ray: it moves data between the steps of ``predict`` and adds none of its own."""
