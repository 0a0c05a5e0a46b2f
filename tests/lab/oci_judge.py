"""Drives the test server with the official SDK and with plain requests; exits 1 on a failure.

Run by tests/it/oci_judge.rs, which puts before it SERVERS: for each set of flags the directories
and endpoints of servers that run.
"""

import base64, concurrent.futures, datetime, hashlib, io, os, random, sys, time, traceback

import oci
import requests
from oci.object_storage import ObjectStorageClient, UploadManager
from oci.object_storage import models
from oci.object_storage.transfer.internal.multipart_object_assembler import MultipartObjectAssembler

# Else they would take precedence over the authority the TLS test trusts.
for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
    os.environ.pop(name, None)
NS, BUCKET, MIB = "testns", "bucket", 1 << 20
tests = []


def test(function):
    tests.append(function)
    return function


def start(*flags):
    directory, endpoint = SERVERS[" ".join(flags)].pop(0)
    config = oci.config.from_file(os.path.join(directory, "client/config"))
    return directory, endpoint, config


def client_for(endpoint, config, **more):
    strategy = oci.retry.NoneRetryStrategy()
    return ObjectStorageClient(config, service_endpoint=endpoint, retry_strategy=strategy, **more)


def fails(status, code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except oci.exceptions.ServiceError as error:
        assert (error.status, error.code) == (status, code), (error.status, error.code, error)
        assert error.request_id
        return error
    raise AssertionError(f"expected {status} {code}")


def fails_plain(response, status, code):
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["opc-request-id"]
    if response.request.method != "HEAD":
        assert response.json()["code"] == code, response.text


def b64(digest):
    return base64.b64encode(digest).decode()


DIR, ENDPOINT, CONFIG = start()
client = client_for(ENDPOINT, CONFIG)
DATA = random.Random(1).randbytes(25 * MIB + 12345)


def file_of(data):
    path = os.path.join(DIR, "upload.bin")
    with open(path, "wb") as file:
        file.write(data)
    return path


@test
def namespace_and_bucket():
    assert client.get_namespace().data == NS
    bucket = client.get_bucket(NS, BUCKET).data
    assert bucket.name == BUCKET and bucket.versioning == "Disabled"
    assert client.head_bucket(NS, BUCKET).headers["etag"] == bucket.etag
    fails(404, "BucketNotFound", client.get_bucket, NS, "nope")
    fails(404, "BucketNotFound", client.get_bucket, "otherns", BUCKET)


@test
def put_get_head_delete():
    body = b"hello world"
    put = client.put_object(NS, BUCKET, "a.txt", body, content_type="text/plain",
                            opc_meta={"colour": "blue"}, opc_client_request_id="me-1")
    assert put.headers["opc-content-md5"] == b64(hashlib.md5(body).digest())
    assert put.headers["opc-client-request-id"] == "me-1"
    got = client.get_object(NS, BUCKET, "a.txt")
    assert got.data.content == body and got.headers["etag"] == put.headers["etag"]
    assert got.headers["opc-meta-colour"] == "blue" and got.headers["content-type"] == "text/plain"
    assert got.headers["content-md5"] == b64(hashlib.md5(body).digest())
    head = client.head_object(NS, BUCKET, "a.txt")
    assert head.headers["content-length"] == "11" and head.headers["last-modified"]
    for range_, want, span in [("bytes=0-3", b"hell", "0-3"), ("bytes=6-", b"world", "6-10"),
                               ("bytes=-4", b"orld", "7-10"), ("bytes=9-50", b"ld", "9-10")]:
        part = client.get_object(NS, BUCKET, "a.txt", range=range_)
        assert part.status == 206 and part.data.content == want
        assert part.headers["content-range"] == f"bytes {span}/11"
    fails(416, "InvalidRange", client.get_object, NS, BUCKET, "a.txt", range="bytes=11-")
    assert client.delete_object(NS, BUCKET, "a.txt").status == 204
    fails(404, "ObjectNotFound", client.get_object, NS, BUCKET, "a.txt")
    fails(404, "ObjectNotFound", client.delete_object, NS, BUCKET, "a.txt")
    assert client.put_object(NS, BUCKET, "empty", b"").status == 200
    assert client.get_object(NS, BUCKET, "empty").data.content == b""
    client.delete_object(NS, BUCKET, "empty")


@test
def conditions():
    etag = client.put_object(NS, BUCKET, "c", b"1", if_none_match="*").headers["etag"]
    fails(412, "IfNoneMatchFailed", client.put_object, NS, BUCKET, "c", b"2", if_none_match="*")
    fails(412, "IfMatchFailed", client.put_object, NS, BUCKET, "c", b"2", if_match="stale")
    fails(412, "IfMatchFailed", client.delete_object, NS, BUCKET, "c", if_match="stale")
    fails(412, "IfMatchFailed", client.get_object, NS, BUCKET, "c", if_match="stale")
    assert client.get_object(NS, BUCKET, "c").data.content == b"1"
    etag = client.put_object(NS, BUCKET, "c", b"2", if_match=etag).headers["etag"]
    assert client.get_object(NS, BUCKET, "c", if_match=etag).data.content == b"2"
    client.delete_object(NS, BUCKET, "c", if_match=etag)


@test
def racing_creators():
    def create(number):
        try:
            return client.put_object(NS, BUCKET, "one", b"%d" % number, if_none_match="*").status
        except oci.exceptions.ServiceError as error:
            return error.status

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(create, range(16))) == [200] + [412] * 15
    client.delete_object(NS, BUCKET, "one")


@test
def names():
    for name in ["a/b/c", "with space", "per%20cent%", "ünïcode/…", "plus+and&?#=", "x//y", "(1)'!*",
                 "dots/../..", "id/7/8"]:
        # Unless it encodes the slashes, the HTTP library resolves the dots.
        for strict in (True,) if ".." in name else (False, True):
            client.put_object(NS, BUCKET, name, name.encode(), enable_strict_url_encoding=strict)
            assert [o.name for o in client.list_objects(NS, BUCKET).data.objects] == [name], name
            got = client.get_object(NS, BUCKET, name,
                                    enable_strict_url_encoding=".." in name or not strict)
            assert got.data.content == name.encode()
            client.delete_object(NS, BUCKET, name)


@test
def listing():
    names = ["d/1", "d/2", "d/e/3", "f", "g", "h/1"]
    for name in names:
        client.put_object(NS, BUCKET, name, b"x")
    page = lambda **more: client.list_objects(NS, BUCKET, **more).data
    assert [o.name for o in page().objects] == names and page().objects[0].size is None
    assert [o.name for o in page(prefix="d/").objects] == ["d/1", "d/2", "d/e/3"]
    assert [o.name for o in page(start="d/2", end="g").objects] == ["d/2", "d/e/3", "f"]
    grouped = page(delimiter="/")
    assert [o.name for o in grouped.objects] == ["f", "g"] and grouped.prefixes == ["d/", "h/"]
    one = page(prefix="d/", delimiter="/", fields="name,size,etag,md5,timeCreated")
    assert one.prefixes == ["d/e/"] and one.objects[0].size == 1 and one.objects[0].etag
    seen, start_at = [], None
    while True:
        some = page(limit=2, **({"start": start_at} if start_at else {}))
        seen += [o.name for o in some.objects]
        start_at = some.next_start_with
        if not start_at:
            break
    assert seen == names
    for name in names:
        client.delete_object(NS, BUCKET, name)


@test
def checksums():
    body = b"checksums"
    sha = b64(hashlib.sha256(body).digest())
    wrong = b64(b"\0" * 16)
    fails(400, "UnmatchedContentMD5", client.put_object, NS, BUCKET, "k", body, content_md5=wrong)
    fails(400, "UnmatchedContentSHA256", client.put_object, NS, BUCKET, "k", body,
          opc_checksum_algorithm="SHA256", opc_content_sha256=b64(b"\0" * 32))
    fails(400, "UnmatchedContentCRC32C", client.put_object, NS, BUCKET, "k", body,
          opc_checksum_algorithm="CRC32C", opc_content_crc32c=b64(b"\0" * 4))
    fails(404, "ObjectNotFound", client.get_object, NS, BUCKET, "k")
    put = client.put_object(NS, BUCKET, "k", body, opc_checksum_algorithm="SHA256",
                            opc_content_sha256=sha, content_md5=b64(hashlib.md5(body).digest()))
    assert put.headers["opc-content-sha256"] == sha
    put = client.put_object(NS, BUCKET, "k", body, opc_checksum_algorithm="SHA384",
                            opc_content_sha384=b64(hashlib.sha384(body).digest()))
    # The check value of CRC-32C for "123456789" is E3069283.
    put = client.put_object(NS, BUCKET, "k", b"123456789", opc_checksum_algorithm="CRC32C",
                            opc_content_crc32c=b64(bytes.fromhex("E3069283")))
    assert client.head_object(NS, BUCKET, "k").headers["opc-content-crc32c"]
    client.delete_object(NS, BUCKET, "k")


def multipart_md5(data, size):
    sums = [hashlib.md5(data[i:i + size]).digest() for i in range(0, len(data), size)]
    return f"{b64(hashlib.md5(b''.join(sums)).digest())}-{len(sums)}"


@test
def upload_manager_file():
    path = file_of(DATA)
    for parallel in (True, False):
        for checksum in (None, "SHA256", "CRC32C"):
            manager = UploadManager(client, allow_parallel_uploads=parallel)
            more = {"opc_checksum_algorithm": checksum} if checksum else {}
            done = manager.upload_file(NS, BUCKET, "big", path, part_size=4 * MIB,
                                       metadata={"kind": "disk"}, **more)
            assert done.headers["opc-multipart-md5"] == multipart_md5(DATA, 4 * MIB)
            got = client.get_object(NS, BUCKET, "big")
            assert b"".join(got.data.raw.stream(1 << 20, decode_content=False)) == DATA
            assert got.headers["opc-meta-kind"] == "disk" and "content-md5" not in got.headers
            if checksum == "CRC32C":
                whole = client.put_object(NS, BUCKET, "w", DATA, opc_checksum_algorithm="CRC32C")
                crc = whole.headers["opc-content-crc32c"]
                assert got.headers["opc-content-crc32c"] == crc
                client.delete_object(NS, BUCKET, "w")
    start_, end = 4 * MIB - 100, 8 * MIB + 100
    part = client.get_object(NS, BUCKET, "big", range=f"bytes={start_}-{end}")
    assert part.data.content == DATA[start_:end + 1]
    manager = UploadManager(client)
    manager.upload_file(NS, BUCKET, "single", file_of(DATA[:1000]))
    assert client.get_object(NS, BUCKET, "single").data.content == DATA[:1000]
    client.delete_object(NS, BUCKET, "single")
    client.delete_object(NS, BUCKET, "big")
    assert not client.list_multipart_uploads(NS, BUCKET).data


@test
def upload_manager_stream():
    manager = UploadManager(client)
    done = manager.upload_stream(NS, BUCKET, "s", io.BytesIO(DATA), part_size=10 * MIB)
    assert done.headers["opc-multipart-md5"] == multipart_md5(DATA, 10 * MIB)
    assert client.get_object(NS, BUCKET, "s").data.content == DATA
    manager.upload_stream(NS, BUCKET, "s", io.BytesIO(b""))
    assert client.get_object(NS, BUCKET, "s").data.content == b""
    client.delete_object(NS, BUCKET, "s")


@test
def resume():
    path = file_of(DATA)
    assembler = MultipartObjectAssembler(client, NS, BUCKET, "r", part_size=4 * MIB)
    assembler.new_upload()
    upload = assembler.manifest["uploadId"]
    for number in (1, 2, 5, 6):  # More than a page of the listing.
        data = DATA[(number - 1) * 4 * MIB:number * 4 * MIB]
        client.upload_part(NS, BUCKET, "r", upload, number, data)
    sent = []
    UploadManager(client).resume_upload_file(NS, BUCKET, "r", path, upload, part_size=4 * MIB,
                                             progress_callback=sent.append)
    assert client.get_object(NS, BUCKET, "r").data.content == DATA
    client.delete_object(NS, BUCKET, "r")
    fails(404, "NoSuchUpload", client.list_multipart_upload_parts, NS, BUCKET, "r", upload)


@test
def multipart_details():
    create = lambda name="m", **more: client.create_multipart_upload(
        NS, BUCKET, models.CreateMultipartUploadDetails(object=name), **more).data.upload_id
    commit = lambda upload, parts, exclude=(), **more: client.commit_multipart_upload(
        NS, BUCKET, "m", upload, models.CommitMultipartUploadDetails(
            parts_to_commit=[models.CommitMultipartUploadPartDetails(part_num=n, etag=e)
                             for n, e in parts], parts_to_exclude=list(exclude)), **more)
    put = lambda upload, number, data, **more: client.upload_part(
        NS, BUCKET, "m", upload, number, data, **more).headers["etag"]
    upload = create()
    others = [create("n"), create("o")]
    first = client.list_multipart_uploads(NS, BUCKET)
    assert [u.object for u in first.data] == ["m", "n"] and first.has_next_page
    rest = client.list_multipart_uploads(NS, BUCKET, page=first.next_page)
    assert [u.object for u in rest.data] == ["o"] and not rest.has_next_page
    old, etag7 = put(upload, 7, b"old"), put(upload, 7, b"seven")
    etag3, etag9 = put(upload, 3, b"three"), put(upload, 9, b"nine")
    fails(400, "InvalidUploadPartNumber", put, upload, 0, b"x")
    fails(400, "InvalidUploadPartNumber", put, upload, 10001, b"x")
    put(upload, 10000, b"x")
    fails(400, "UnmatchedContentMD5", put, upload, 3, b"bad", content_md5=b64(b"\0" * 16))
    parts = oci.pagination.list_call_get_all_results(
        client.list_multipart_upload_parts, NS, BUCKET, "m", upload).data
    assert [(p.part_number, p.size) for p in parts] == [(3, 5), (7, 5), (9, 4), (10000, 1)]
    assert parts[0].etag == etag3 and parts[0].md5 == b64(hashlib.md5(b"three").digest())
    fails(400, "InvalidUploadPart", commit, upload, [(3, etag3), (7, old)])
    fails(400, "InvalidUploadPart", commit, upload, [(4, etag3)])
    fails(400, "InvalidParameter", commit, upload, [])
    fails(404, "NoSuchUpload", put, "ffff", 1, b"x")
    fails(404, "NoSuchUpload", client.upload_part, NS, BUCKET, "other", upload, 1, b"x")
    client.put_object(NS, BUCKET, "m", b"there")
    fails(412, "IfNoneMatchFailed", commit, upload, [(3, etag3)], if_none_match="*")
    fails(412, "IfNoneMatchFailed", create, if_none_match="*")
    commit(upload, [(7, etag7), (3, etag3)], exclude=[9])
    assert client.get_object(NS, BUCKET, "m").data.content == b"threeseven"
    fails(404, "NoSuchUpload", commit, upload, [(3, etag3)])
    for name, id_ in zip("no", others):
        client.abort_multipart_upload(NS, BUCKET, name, id_)
        fails(404, "NoSuchUpload", client.abort_multipart_upload, NS, BUCKET, name, id_)
    client.delete_object(NS, BUCKET, "m")


def make_par(access, object_=None, listing="Deny", days=1, by=None):
    expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    details = models.CreatePreauthenticatedRequestDetails(
        name="p", access_type=access, object_name=object_, bucket_listing_action=listing,
        time_expires=expires)
    return (by or client).create_preauthenticated_request(NS, BUCKET, details).data


@test
def par_object():
    par = make_par("ObjectReadWrite", "dir/par obj")
    url = ENDPOINT + par.access_uri
    assert par.full_path == url
    put = requests.put(url, data=b"12345", headers={"opc-meta-x": "y"})
    assert put.status_code == 200 and put.headers["etag"]
    got = requests.get(url, headers={"Range": "bytes=1-2"})
    assert got.status_code == 206 and got.content == b"23" and got.headers["opc-meta-x"] == "y"
    assert requests.head(url).headers["Content-Length"] == "5"
    fails_plain(requests.put(url, data=b"1", headers={"If-None-Match": "*"}), 412,
                "IfNoneMatchFailed")
    fails_plain(requests.put(url, data=b"1", headers={"Content-MD5": b64(b"\0" * 16)}), 400,
                "UnmatchedContentMD5")
    fails_plain(requests.delete(url), 404, "BucketNotFound")
    fails_plain(requests.get(url + "x"), 404, "BucketNotFound")
    fails_plain(requests.get(url.replace("/p/", "/p/x")), 404, "BucketNotFound")
    read = ENDPOINT + make_par("ObjectRead", "dir/par obj").access_uri
    assert requests.get(read).content == b"12345"
    fails_plain(requests.put(read, data=b"no"), 404, "BucketNotFound")
    write = ENDPOINT + make_par("ObjectWrite", "dir/par obj").access_uri
    fails_plain(requests.get(write), 404, "BucketNotFound")
    fails_plain(requests.head(write), 404, "BucketNotFound")
    expired = ENDPOINT + make_par("ObjectRead", "dir/par obj", days=-1).access_uri
    fails_plain(requests.get(expired), 404, "BucketNotFound")
    listed = oci.pagination.list_call_get_all_results(
        client.list_preauthenticated_requests, NS, BUCKET).data
    assert len(listed) == 4
    assert client.get_preauthenticated_request(NS, BUCKET, par.id).data.access_type == \
        "ObjectReadWrite"
    for one in listed:
        client.delete_preauthenticated_request(NS, BUCKET, one.id)
    fails_plain(requests.get(url), 404, "BucketNotFound")
    client.delete_object(NS, BUCKET, "dir/par obj")


@test
def par_prefix():
    par = make_par("AnyObjectReadWrite", "pre/", "ListObjects")
    base = ENDPOINT + par.access_uri
    assert base.endswith("/o/")
    assert requests.put(base + "pre/ä b", data=b"1").status_code == 200
    fails_plain(requests.put(base + "other", data=b"1"), 404, "BucketNotFound")
    got = requests.get(base, params={"prefix": "pre/", "fields": "name,size"}).json()
    assert got["objects"] == [{"name": "pre/ä b", "size": 1}]
    fails_plain(requests.get(base), 404, "BucketNotFound")
    deny = ENDPOINT + make_par("AnyObjectRead").access_uri
    fails_plain(requests.get(deny), 404, "BucketNotFound")
    assert requests.get(deny + "pre/%C3%A4%20b").content == b"1"
    client.delete_object(NS, BUCKET, "pre/ä b")


@test
def par_multipart():
    url = ENDPOINT + make_par("AnyObjectWrite").access_uri + "vm/disk%201/id/x"
    started = requests.put(url, headers={"opc-multipart": "true", "opc-meta-a": "b"})
    assert started.status_code == 200
    uri = started.json()["accessUri"]
    assert uri.endswith(f"/id/{started.json()['uploadId']}/")
    assert started.json()["object"] == "vm/disk 1/id/x"
    size = 8 * MIB
    for number in (3, 1, 2, 4):
        data = DATA[(number - 1) * size:number * size]
        put = requests.put(f"{ENDPOINT}{uri}{number}", data=data)
        assert put.status_code == 200 and put.headers["etag"]
        assert put.headers["opc-content-md5"] == b64(hashlib.md5(data).digest())
    fails_plain(requests.put(f"{ENDPOINT}{uri}0", data=b"x"), 400, "InvalidUploadPartNumber")
    fails_plain(requests.get(ENDPOINT + uri), 404, "BucketNotFound")
    fails_plain(requests.get(ENDPOINT + uri.split("/u/")[0] + "/o/vm"), 404, "BucketNotFound")
    done = requests.post(ENDPOINT + uri)
    assert done.status_code == 200 and done.headers["opc-multipart-md5"].endswith("-4")
    got = client.get_object(NS, BUCKET, "vm/disk 1/id/x")
    assert got.data.content == DATA and got.headers["opc-meta-a"] == "b"
    fails_plain(requests.post(ENDPOINT + uri), 404, "NoSuchUpload")
    uri = requests.put(url, headers={"opc-multipart": "true"}).json()["accessUri"]
    requests.put(f"{ENDPOINT}{uri}1", data=b"x")
    assert requests.delete(ENDPOINT + uri).status_code == 204
    fails_plain(requests.put(f"{ENDPOINT}{uri}1", data=b"x"), 404, "NoSuchUpload")
    client.delete_object(NS, BUCKET, "vm/disk 1/id/x")
    assert not client.list_multipart_uploads(NS, BUCKET).data


@test
def signatures():
    _, _, other = start()
    stranger = client_for(ENDPOINT, other)
    fails(401, "NotAuthenticated", stranger.get_namespace)
    fails(401, "NotAuthenticated", stranger.put_object, NS, BUCKET, "x", b"x")
    forged = dict(CONFIG, key_file=other["key_file"])
    fails(401, "NotAuthenticated", client_for(ENDPOINT, forged).get_namespace)
    url = f"{ENDPOINT}/n/{NS}/b/{BUCKET}/o/x"
    fails_plain(requests.get(url), 401, "NotAuthenticated")
    signer = oci.signer.Signer.from_config(CONFIG)

    def signed(method, url, body=None, change=None, **headers):
        request = requests.Request(method, url, data=body, headers=headers, auth=signer).prepare()
        if change:
            change(request)
        return requests.Session().send(request)

    assert signed("GET", f"{ENDPOINT}/n/").status_code == 200
    # A full signature with the body's hash on PutObject, as a client may send it.
    assert signed("PUT", url, b"abc").status_code == 200
    tampered = lambda request: setattr(request, "body", b"abd")
    fails_plain(signed("PUT", url, b"abc", tampered), 401, "NotAuthenticated")
    create = f"{ENDPOINT}/n/{NS}/b/{BUCKET}/u"
    fails_plain(signed("POST", create, b'{"object":"a"}',
                       lambda r: setattr(r, "body", b'{"object":"b"}')), 401, "NotAuthenticated")

    def move(request):
        request.url += "?versionId=1"

    fails_plain(signed("GET", url, change=move), 401, "NotAuthenticated")
    fails_plain(signed("GET", url, date="Sun, 06 Nov 1994 08:49:37 GMT"), 401, "NotAuthenticated")
    bare = signer.without_content_headers
    response = requests.post(create, data=b'{"object":"a"}', auth=bare)
    fails_plain(response, 401, "NotAuthenticated")
    # A hash that is sent on PutObject has to be signed as well.
    three = {"x-content-sha256": b64(hashlib.sha256(b"abc").digest())}
    fails_plain(requests.put(url, data=b"abc", headers=three, auth=bare), 401, "NotAuthenticated")
    assert requests.put(url, data=b"abc", auth=bare).status_code == 200
    client.delete_object(NS, BUCKET, "x")
    chunked = requests.put(ENDPOINT + make_par("ObjectWrite", "z").access_uri, data=iter([b"x"]))
    fails_plain(chunked, 411, "MissingContentLength")


@test
def clock_skew():
    for offset, good in [(-299_000, True), (298_000, True), (302_000, False), (-303_000, False)]:
        _, endpoint, config = start("--clock-offset", str(offset))
        call = client_for(endpoint, config).get_namespace
        if good:
            assert call().data == NS
        else:
            assert "not within allowed clock skew" in fails(401, "NotAuthenticated", call).message


@test
def tls():
    directory, endpoint, config = start("--tls")
    assert endpoint.startswith("https://")
    secure = client_for(endpoint, config)
    secure.base_client.session.verify = os.path.join(directory, "store/ca.pem")
    UploadManager(secure).upload_stream(NS, BUCKET, "t", io.BytesIO(DATA), part_size=5 * MIB)
    assert secure.get_object(NS, BUCKET, "t").data.content == DATA


@test
def bucket_states():
    first = client.put_object(NS, "versioned", "v", b"1").headers["version-id"]
    client.put_object(NS, "versioned", "v", b"22")
    assert client.get_object(NS, "versioned", "v", version_id=first).data.content == b"1"
    assert client.delete_object(NS, "versioned", "v").headers["is-delete-marker"] == "true"
    fails(404, "ObjectNotFound", client.get_object, NS, "versioned", "v")
    client.put_object(NS, "retained", "r", b"1")
    fails(403, "RetentionRuleViolation", client.put_object, NS, "retained", "r", b"2")
    fails(403, "RetentionRuleViolation", client.delete_object, NS, "retained", "r")
    client.put_object(NS, "small", "s", b"x" * 1000)
    fails(400, "QuotaExceeded", client.put_object, NS, "small", "t", b"x" * MIB)


@test
def nothing_left_on_disk():
    time.sleep(0.3)
    left = os.listdir(os.path.join(DIR, "store"))
    assert len(left) <= 4, left  # The versions and what retention and quota tests left.


failed = 0
for function in tests:
    began = time.time()
    try:
        function()
        print(f"ok    {function.__name__} ({time.time() - began:.2f} s)")
    except Exception:
        failed += 1
        print(f"FAIL  {function.__name__}")
        traceback.print_exc()
print(f"{len(tests) - failed} passed, {failed} failed")
sys.exit(bool(failed))
