"""What three drivers of the IFC VF do to its registers, access by access, replayed against the card."""
