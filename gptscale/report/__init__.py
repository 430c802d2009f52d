"""What a run folder tells: as a page (`report.html`) and in a terminal (`gptscale inspect`). Reads files; no torch."""
