package cache

func writer(string) {}
