"""An authorization server for the end-to-end tests: django-oauth-toolkit.

Its variables are

  ADDRESS   where it listens: 127.0.0.1:8000
  DATABASE  a file for SQLite, which it creates
  LIFETIME  the lifetime of its tokens, in seconds
  CLIENTS   the OAuth clients, a JSON array with the members of RFC 7591

If the file is there, it has the clients, and all tokens since then.
"""

import json
import os

import django
from django.conf import settings
from django.core.management import call_command
from django.urls import include, path

database = os.environ["DATABASE"]
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "oauth2_provider"],
    # As in each new project, it redirects to the URL with a slash at its end.
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    # The tables come from the models at once, which is much faster than step by step.
    MIGRATION_MODULES={"auth": None, "contenttypes": None, "oauth2_provider": None},
    OAUTH2_PROVIDER={
        "ACCESS_TOKEN_EXPIRE_SECONDS": int(os.environ["LIFETIME"]),
        "OIDC_ENABLED": True,  # for its metadata
        "SCOPES": {"api:read": "", "api:write": ""},
    },
    ROOT_URLCONF=__name__,
    SECRET_KEY="for tests only",
    USE_TZ=True,
)
django.setup()
urlpatterns = [path("o/", include("oauth2_provider.urls", namespace="oauth2_provider"))]
if not os.path.exists(database):
    from oauth2_provider.models import Application

    call_command("migrate", run_syncdb=True, verbosity=0)
    for client in json.loads(os.environ["CLIENTS"]):
        grant, *_ = client.get("grant_types", ["client_credentials"])
        Application.objects.create(
            client_id=client["client_id"],
            client_secret=client["client_secret"],
            client_type=Application.CLIENT_CONFIDENTIAL,
            authorization_grant_type=grant.replace("_", "-"),
        )
call_command("runserver", os.environ["ADDRESS"], use_reloader=False)
