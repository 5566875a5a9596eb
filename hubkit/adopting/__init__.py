"""Making an adapter of what another tool wrote: a PEFT or AdapterHub folder, resized vocabularies."""
