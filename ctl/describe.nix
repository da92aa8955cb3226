# What is to be installed of an attribute of a Nix expression: which outputs of which
# derivation, and what it is called.
{ file, attr, system }:
let
  value = import file;
  # An expression may be a function of its arguments, which all have defaults.
  called = if builtins.isFunction value
    then value (if builtins.functionArgs value ? system then { inherit system; } else { })
    else value;
  names = builtins.filter builtins.isString (builtins.split "\\." attr);
  pick = at: name:
    if builtins.isAttrs at && builtins.hasAttr name at then at.${name}
    else throw "${toString file} has no attribute ${attr}${
      if builtins.isAttrs at then ": where ${name} should be it has " + builtins.concatStringsSep " " (builtins.attrNames at) else ""}";
  found = builtins.foldl' pick called (if attr == "" then [ ] else names);
  one = if found.type or "" == "derivation" then found
    else throw "${toString file}${if attr == "" then "" else " " + attr} is no derivation${
      if builtins.isAttrs found then ", but has: " + builtins.concatStringsSep " " (builtins.attrNames found) else ""}";
  wanted = one.meta.outputsToInstall or [ (one.outputName or "out") ];
  parsed = builtins.parseDrvName one.name;
in {
  name = one.pname or parsed.name;
  version = one.version or parsed.version;
  system = one.system;
  drv = builtins.unsafeDiscardStringContext one.drvPath;
  outputs = wanted;
  paths = map (o: builtins.unsafeDiscardStringContext one.${o}.outPath) wanted; # true if it is not content-addressed
  priority = one.meta.priority or null;
}
