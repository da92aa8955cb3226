# Derivations of every kind, for drv_test.go. `builder` is never run for the vectors.
let
  sh = { system = builtins.currentSystem; builder = "/bin/sh"; };
  drv = attrs: derivation (sh // attrs);
  source = builtins.toFile "source.txt" "a source\n";
  simple = drv { name = "simple"; args = [ "-c" "echo hi > $out" ]; };
  fixed = name: algo: mode: hash: drv { inherit name; args = [ "-c" "echo ${name} > $out" ]; outputHashAlgo = algo; outputHashMode = mode; outputHash = hash; };
  md5 = "d41d8cd98f00b204e9800998ecf8427e";
  sha1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
  sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  sha512 = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
  floating = drv { name = "floating"; outputs = [ "out" "dev" ]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; dep = simple; args = [ "-c" "echo $dep > $out; echo $out > $dev" ]; };
  impure = drv { name = "impure"; __impure = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; args = [ "-c" "echo impure > $out" ]; };
in rec {
  inherit simple floating impure;
  escapes = drv { name = "escapes"; text = "tab\t quote\" backslash\\ return\r line\n dollar$ ünï"; args = [ "-c" "echo \"$text\" > $out\n" "" ]; };
  outputs = drv { name = "outputs"; outputs = [ "out" "lib" "dev" ]; inherit source; dep = simple; args = [ "-c" "echo $source $dep > $out; echo l > $lib; echo d > $dev" ]; };
  user = drv { name = "user"; a = outputs.lib; b = outputs.dev; c = simple; inherit source; args = [ "-c" "echo $a $b $c > $out" ]; };
  flatMd5 = fixed "flat-md5" "md5" "flat" md5;
  flatSha1 = fixed "flat-sha1" "sha1" "flat" sha1;
  flatSha256 = fixed "flat-sha256" "sha256" "flat" sha256;
  flatSha512 = fixed "flat-sha512" "sha512" "flat" sha512;
  treeMd5 = fixed "tree-md5" "md5" "recursive" md5;
  treeSha1 = fixed "tree-sha1" "sha1" "recursive" sha1;
  treeSha256 = fixed "tree-sha256" "sha256" "recursive" sha256;
  treeSha512 = fixed "tree-sha512" "sha512" "recursive" sha512;
  # Two ways to fetch the same are one input to who uses them.
  mirror = drv { name = "tree-sha256"; args = [ "-c" "echo another way > $out" ]; outputHashAlgo = "sha256"; outputHashMode = "recursive"; outputHash = sha256; };
  useFetched = drv { name = "use"; a = treeSha256; args = [ "-c" "echo $a > $out" ]; };
  useMirror = drv { name = "use"; a = mirror; args = [ "-c" "echo $a > $out" ]; };
  useBoth = drv { name = "use-both"; a = treeSha256; b = mirror; c = flatSha512; args = [ "-c" "echo $a $b $c > $out" ]; };
  structured = drv { name = "structured"; __structuredAttrs = true; outputs = [ "out" "doc" ]; list = [ 1 "zwei" { three = [ true null ]; } ]; nested = { "key \"x\"" = "line\nend"; }; dep = simple; args = [ "-c" "echo s" ]; };
  floatingFlat = drv { name = "floating-flat"; __contentAddressed = true; outputHashMode = "flat"; outputHashAlgo = "sha1"; args = [ "-c" "echo f > $out" ]; };
  deferred = drv { name = "deferred"; outputs = [ "out" "man" ]; a = floating; b = floating.dev; args = [ "-c" "echo $a $b > $out; echo m > $man" ]; };
  deferredAgain = drv { name = "deferred-again"; a = deferred.man; args = [ "-c" "echo $a > $out" ]; };
  useImpure = drv { name = "use-impure"; __impure = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; a = impure; args = [ "-c" "echo $a > $out" ]; };
}
