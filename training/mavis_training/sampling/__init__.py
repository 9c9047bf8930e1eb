"""How trees grow (Algorithm 3), and the reference policy that they are sampled from."""
