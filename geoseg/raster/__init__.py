"""Pixels and where they lie: grids, windows, stores, GeoTIFF and COG. Knows numpy and rasterio, not torch, not Ray.

GDAL is kept on a short lead from here on: only its GTiff, COG and MEM drivers stay registered, it never looks for files
beside the one it is given, and its block cache is bounded. A VRT named ``.tif`` could otherwise read any file or URL.
PROJ keeps off the network.
"""

from __future__ import annotations

import os

_SKIPPED_DRIVERS = (
    "AAIGrid,ACE2,ADRG,AIG,AVCBin,AVCE00,AirSAR,BAG,BIGGIF,BLX,BMP,BSB,BT,BYN,CALS,CEOS,COASP,COSAR,CPG,CTG,CTable2,"
    "DAAS,DERIVED,DIMAP,DIPEx,DOQ1,DOQ2,DTED,ECRGTOC,EEDA,EEDAI,EHdr,EIR,ELAS,ENVI,ERS,ESAT,ESRI Shapefile,ESRIC,"
    "ESRIJSON,FAST,FIT,GFF,GIF,GNMDatabase,GNMFile,GPKG,GRASSASCIIGrid,GRIB,GS7BG,GSAG,GSBG,GSC,GTI,GTX,GXF,GenBin,"
    "GeoJSON,GeoJSONSeq,HDF5,HDF5Image,HF2,HFA,HTTP,ILWIS,IRIS,ISCE,ISG,ISIS2,ISIS3,JAXAPALSAR,JDEM,JP2OpenJPEG,JPEG,"
    "KMLSUPEROVERLAY,KRO,L1B,LAN,LCP,LOSLAS,Leveller,MAP,MBTiles,MFF,MFF2,MRF,MSGN,MVT,Memory,NDF,NGSGEOID,NITF,NOAA_B,"
    "NSIDCbin,NTv2,NWT_GRC,NWT_GRD,OSM,OZI,PAux,PCIDSK,PCRaster,PDF,PDS,PDS4,PLMOSAIC,PNG,PNM,PRF,R,RIK,RMF,ROI_PAC,"
    "RPFTOC,RRASTER,RS2,RST,Rasterlite,S102,S104,S111,SAFE,SAGA,SAR_CEOS,SDTS,SENTINEL2,SGI,SIGDEM,SNAP_TIFF,SNODAS,"
    "SQLite,SRP,SRTMHGT,STACIT,STACTA,TGA,TIL,TSX,Terragen,TopoJSON,USGSDEM,VICAR,VRT,WCS,WEBP,WMS,WMTS,XPM,XYZ,ZMap,"
    "Zarr,netCDF"
)

os.environ["GDAL_SKIP"] = _SKIPPED_DRIVERS
os.environ["GDAL_DISABLE_READDIR_ON_OPEN"] = "EMPTY_DIR"
os.environ["GDAL_PAM_ENABLED"] = "NO"
os.environ["PROJ_NETWORK"] = "OFF"  # a CRS may name a URL
os.environ.setdefault("GDAL_CACHEMAX", "64")  # MiB; GDAL's own default is 5 % of the machine for each process
