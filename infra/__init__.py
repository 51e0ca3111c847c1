"""How Consilium is deployed: settings of a site and of the coordinator."""
