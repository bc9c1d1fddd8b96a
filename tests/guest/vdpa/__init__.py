"""vDPA in a guest: the card below the kernel's ifcvf and below its vp_vdpa, one set of sentences for both."""
