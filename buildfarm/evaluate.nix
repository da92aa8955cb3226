# What an expression has to be installed. Of each of paths, a JSON list of lists of names:
# nothing, what the derivation there is, or the paths of what is in the set there, if it
# wants to be looked into (recurseForDerivations, as of nix-env; the expression itself does).
{ file, system, paths }:
let
  inherit (builtins) attrNames concatStringsSep deepSeq foldl' fromJSON functionArgs isAttrs isFunction isString listToAttrs map parseDrvName tryEval unsafeDiscardStringContext;
  value = import file;
  called = if isFunction value
    then value (if functionArgs value ? system then { inherit system; } else { })
    else value;
  sure = x: let r = tryEval x; in r.success && r.value;
  isDerivation = x: (x.type or "") == "derivation";
  text = x: if isString x then unsafeDiscardStringContext x else "";
  look = path:
    let tried = tryEval (foldl' (at: name: at.${name}) called path); x = tried.value; in
    if !tried.success || !(isAttrs x) then [ ]
    else if sure (isDerivation x) then [ (describe path x) ]
    else if path == [ ] || sure (x.recurseForDerivations or false) then map (name: { inside = path ++ [ name ]; }) (attrNames x)
    else [ ];
  describe = path: x:
    let
      parsed = parseDrvName x.name;
      attr = concatStringsSep "." path;
      outputs = x.outputs or [ (x.outputName or "out") ];
      one = {
        inherit attr outputs;
        name = text (x.pname or parsed.name);
        version = text (x.version or parsed.version);
        system = x.system;
        description = text (x.meta.description or "");
        drv = unsafeDiscardStringContext x.drvPath;
        paths = listToAttrs (map (o: { name = o; value = unsafeDiscardStringContext x.${o}.outPath; }) outputs);
        install = x.meta.outputsToInstall or [ (x.outputName or "out") ];
        priority = x.meta.priority or null;
      };
      tried = tryEval (deepSeq one one);
    in
    if tried.success then tried.value else { inherit attr; error = "it refuses to be evaluated (as broken, unfree or for other systems)"; };
in map look (fromJSON paths)
