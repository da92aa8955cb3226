# The world of tools: every package that was asked for, Python with numpy, and a
# C compiler with all it needs.
let
  all = (import ./packages.nix).build { };
  tops = builtins.fromJSON (builtins.readFile ./tops.json);
  # nix-build passes over attributes with a dot in their names.
  undotted = builtins.replaceStrings [ "." ] [ "_" ];
in
builtins.listToAttrs (map (name: { name = undotted name; value = all.${name}; }) tops)
  // { inherit (all) python compiler; }
