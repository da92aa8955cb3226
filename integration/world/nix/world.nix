# The demo world.
let
  inherit (import ./packages.nix) packages build;
  world = build { };
  previous = build { replace = { git = packages.git-previous // { deps = packages.git.deps; }; }; };
  rebuilt = build { revision = { libblas3 = "2"; }; };
in
{
  inherit (world) git ripgrep python file;
  numpy = world.python3-numpy;
  numpy-rebuilt = rebuilt.python3-numpy;
} // (if packages ? git-previous then { git-previous = previous.git; } else { })
