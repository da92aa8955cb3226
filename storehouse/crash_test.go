package storehouse

func runChild(string) {}
