"""How much does our own work cost the host, without models?"""
